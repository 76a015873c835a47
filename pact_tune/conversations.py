"""Chats to token ids: which tokens are responses, and what the response-only view of one is.

Everything that looks at a chat (identification, training, reference views, evaluation) renders it here, with the
model's own Hugging Face chat template, so that positions line up everywhere.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pact_tune.errors import UserError

# Llama 3.2's template writes the day on which it is rendered, unless it is given one. Equal data must be equal tokens
# tomorrow (cached references, a run that is resumed after midnight), so it gets the day that Llama 3.1's template writes.
DATE = "26 Jul 2024"


class RejectedChat(UserError):
    """A chat that its chat template will not render, or only so that its responses cannot be located."""


class Message(TypedDict):
    """One turn of a chat: ``role`` ("system", "user" or "assistant") and ``content`` (text)."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A tokenized chat.

    Attributes:
        tokens (list[int]): ids of the chat, ending with the last response.
        responses (list[tuple[int, int]]): one half-open range of ``tokens`` per assistant turn: from the first token
            after the assistant header to its end-of-turn token, included.
        ce_weight (float): factor of this row's cross-entropy; 0: it is not trained on, only constrained.
        weight (float): factor of this row's constraint; 0: it is only trained on.
    """

    tokens: list[int]
    responses: list[tuple[int, int]]
    ce_weight: float = 1.0
    weight: float = 1.0

    @property
    def num_response_tokens(self) -> int:
        return sum(end - start for start, end in self.responses)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads a Hugging Face tokenizer and makes sure that it can render chats and pad.

    Args:
        path (str): folder or Hub name.

    Returns:
        PreTrainedTokenizerBase: the tokenizer, with a pad token.

    Raises:
        UserError: no tokenizer there, or one without a chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser stumbles over
        raise UserError(
            f"No tokenizer could be loaded from '{path}': give a folder with tokenizer.json and tokenizer_config.json, "
            f"or a Hub name that is downloaded or reachable ({one_line(error)})."
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer in '{path}' has no chat template; use the instruct model's tokenizer, "
            "or put its chat_template.jinja beside tokenizer.json."
        )
    if tokenizer.pad_token is None:
        # Any token does: padding stands on the right of what is read.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the map from token to id: equal exactly when the same ids mean the same tokens.

    Args:
        tokenizer (PreTrainedTokenizerBase): any tokenizer.

    Returns:
        str: 32 hexadecimal digits.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.blake2b(json.dumps(vocabulary).encode(), digest_size=16).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered template text (which already holds its BOS, if any)."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of a chat up to and including the assistant header, as a model is prompted with.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        messages (list[Message]): turns, the last one of the user.

    Returns:
        list[int]: the ids.
    """
    return encode(tokenizer, _apply_template(tokenizer, messages, header=True))


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[Message], header: bool) -> str:
    """The chat as text; with ``header`` it ends with the header of the assistant turn to come."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header, date_string=DATE)
    except jinja2.TemplateError as error:
        raise RejectedChat(f"The chat template does not take this chat: {one_line(error)}.") from error


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Conversation:
    """Tokenizes a chat and finds its responses.

    Prompt and response are tokenized apart, as they are when a model answers, so that no token straddles the border.
    A response ends with its end-of-turn token; what the template writes after that (Qwen: a newline) belongs to
    the prompt of the next turn.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        messages (list[Message]): turns; each assistant turn is a response.

    Returns:
        Conversation: ids and response ranges; no ranges when there is no assistant turn.

    Raises:
        UserError: the template rewrites earlier turns, so that responses cannot be located. A chat that the template
            does not take (an order of roles, a system message), or that begins with the assistant, is a
            :class:`RejectedChat`.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens: list[int] = []
    responses: list[tuple[int, int]] = []
    done = ""  # the rendered text that `tokens` covers
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise RejectedChat("The chat begins with the assistant: there is nothing to respond to.")
        prompt = _apply_template(tokenizer, messages[:index], header=True)
        whole = _apply_template(tokenizer, messages[: index + 1], header=False)
        if not whole.startswith(prompt):
            raise UserError(
                "The chat template begins an answered assistant turn in another way than the one it prompts for, so "
                "responses cannot be located; use a template whose add_generation_prompt adds the assistant header alone."
            )
        if not prompt.startswith(done):
            raise UserError(
                "The chat template changes earlier turns when a later one is added, so the responses of a chat of "
                "several turns cannot be located; train on chats with one assistant turn."
            )
        tokens += encode(tokenizer, prompt[len(done) :])
        answer = encode(tokenizer, whole[len(prompt) :])
        # The last special token closes the turn; a template without one leaves the whole text to the response.
        length = max((i + 1 for i, token in enumerate(answer) if token in special), default=len(answer))
        responses.append((len(tokens), len(tokens) + length))
        tokens += answer
        done = whole
    if responses:
        tokens = tokens[: responses[-1][1]]
    return Conversation(tokens, responses)


@functools.lru_cache
def response_only_prefix(tokenizer: PreTrainedTokenizerBase, bos: bool = True) -> tuple[int, ...]:
    """What precedes a response in its response-only view (paper, section 3.2): the assistant header alone.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        bos (bool): begin with BOS where the chat template does (Llama 3, Gemma); the released code leaves it out.

    Returns:
        tuple[int, ...]: ids of (BOS +) assistant header.

    Raises:
        UserError: the template has no assistant header.
    """
    user = [{"role": "user", "content": "x"}]
    without = _apply_template(tokenizer, user, header=False)
    with_header = _apply_template(tokenizer, user, header=True)
    header = with_header.removeprefix(without)
    if not header or header == with_header:
        raise UserError(
            "The chat template writes no assistant header for add_generation_prompt=True, which the response-only "
            "view needs; use the instruct model's template, or set response_only: False."
        )
    starts_with_bos = tokenizer.bos_token is not None and without.startswith(tokenizer.bos_token)
    prefix = [tokenizer.bos_token_id] if bos and starts_with_bos else []
    return tuple(prefix + encode(tokenizer, header))


def one_line(error: Exception) -> str:
    """What an exception says, as one line without a full stop, cut to 200 characters, to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")


def vocabulary_size(checkpoint_dir: str | Path) -> int:
    """Rows of a checkpoint's output head, read from its config.json (often more than the tokenizer has tokens)."""
    return json.loads((Path(checkpoint_dir) / "config.json").read_text())["vocab_size"]
