"""Chats to token ids: which tokens are responses, and what the response-only view of one is.

Everything that looks at a chat (identification, training, reference views, evaluation) renders it here, with the
model's own Hugging Face chat template, so that positions line up everywhere.
"""

import functools
import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pact_tune.errors import UserError, cannot_load, one_line

# Llama 3.2's template writes the day on which it is rendered, unless it is given one. Equal data must be equal tokens
# tomorrow (cached references, a run that is resumed after midnight), so it gets the day that Llama 3.1's template writes.
DATE = "26 Jul 2024"


# Stands for an answer's text where only what a template writes around it is asked for.
PLACEHOLDER = "b1c7placeholder7c1b"
THINK, END_OF_THINKING = "<think>", "</think>"  # around the reasoning that an answer's text may begin with


class RejectedChat(UserError):
    """A chat that its chat template will not render, or only as another text than the one that is given."""


class Message(TypedDict):
    """One turn of a chat: ``role`` ("system", "user", "assistant" or "tool") and ``content`` (text).

    ``weight`` 0 on an assistant turn: it is context and no response (the name is OpenAI's). The other keys are passed on
    to the chat template.
    """

    role: str
    content: str
    weight: NotRequired[float]
    tool_calls: NotRequired[list[Any]]
    reasoning_content: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


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

    @functools.cached_property
    def num_response_tokens(self) -> int:
        return sum(end - start for start, end in self.responses)

    @functools.cached_property
    def key(self) -> bytes:
        """Content address: 16 bytes, a hash of token ids and response ranges; weights do not change a reference."""
        numbers = [len(self.tokens), *self.tokens, *(n for span in self.responses for n in span)]
        return hashlib.blake2b(array("q", numbers).tobytes(), digest_size=16).digest()


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a Hugging Face tokenizer and makes sure that it can render chats and pad.

    Args:
        path (str): folder or Hub name.
        trust_remote_code (bool): let the folder's own Python code run, where its tokenizer is made by such.

    Returns:
        PreTrainedTokenizerBase: the tokenizer, with a pad token.

    Raises:
        UserError: no tokenizer there, or one without a chat template.
    """
    try:
        # Not given, transformers would ask on standard input, and take a "y" that was meant for something else.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser stumbles over
        if Path(path).is_absolute() and not Path(path).exists():
            raise UserError(
                f"There is no folder '{path}' on this machine: name the aligned model's (checkpoint_dir)."
            ) from error
        if "trust_remote_code" in str(error):
            raise cannot_load("tokenizer", path, error) from error
        raise UserError(
            f"No tokenizer could be loaded from '{path}': give a folder with tokenizer.json and tokenizer_config.json, "
            f"or a Hub name that is downloaded or reachable ({one_line(error)})."
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # From config.json alone transformers makes a tokenizer of no tokens.
        raise UserError(
            f"No tokenizer could be loaded from '{path}': there is a model but no vocabulary; copy tokenizer.json and "
            "tokenizer_config.json from where the model was made."
        )
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
    template: Any = tokenizer.apply_chat_template  # its annotations know no tool calls, and not that this returns text
    try:
        return template(messages, tokenize=False, add_generation_prompt=header, date_string=DATE)
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # templates are programs
        raise RejectedChat(f"The chat template does not take this chat: {one_line(error)}.") from error


def is_response(message: Message) -> bool:
    """Whether a turn is trained on: one of the assistant that has text, calls no tool and is not given a weight of 0.

    An empty turn, or one that holds nothing but a tool call, would teach silence.
    """
    answers = message["role"] == "assistant" and bool(message["content"].strip())
    return answers and not message.get("tool_calls") and message.get("weight", 1) != 0


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Conversation:
    """Tokenizes a chat that its template writes as one text (see :func:`render_turns`).

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        messages (list[Message]): turns.

    Returns:
        Conversation: ids and response ranges; empty when there is no response.

    Raises:
        UserError: the template writes earlier turns in another way once a later one follows.
        RejectedChat: the template does not take this chat.
    """
    conversations = render_turns(tokenizer, messages)
    if len(conversations) > 1:
        raise UserError(
            "The chat template writes earlier turns in another way when a later one is added, so this chat is "
            f"{len(conversations)} texts and not one: give one turn at a time."
        )
    return conversations[0] if conversations else Conversation([], [])


def render_turns(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Conversation]:
    """Tokenizes a chat and finds its responses, each after exactly the prompt that a served model would answer.

    Every response is rendered up to itself. As long as the next prompt continues what stands there, responses share one
    conversation. A template that writes earlier turns in another way once a later one follows (Qwen3 drops their
    reasoning) gives one conversation for each such prompt: the earlier turns are context there, written as a server
    writes them, and each response is trained once.

    Prompt and response are tokenized apart, as they are when a model answers, so that no token straddles the border. A
    response is all that the template writes from there to the end of the turn (of Qwen3 an empty ``<think>`` block too);
    reasoning in a text that the template drops even there (DeepSeek R1's is written for the history alone) is put back, as
    the model generates it. What follows the end-of-turn token (Qwen, Gemma: a newline) belongs to the prompt of the next turn. Without an
    end-of-turn token all of it is the response's.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        messages (list[Message]): turns; see :func:`is_response` for those that are responses.

    Returns:
        list[Conversation]: one or, of a template that rewrites, several; none when there is no response.

    Raises:
        RejectedChat: the template does not take this chat (an order of roles, a system message), drops or changes its
            texts, ignores ``add_generation_prompt``, so that its header would be trained, or the chat begins with the
            assistant.
    """
    conversations: list[Conversation] = []
    tokens: list[int] = []  # up to the end of the last response
    responses: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if not is_response(message):
            continue
        prompt = _apply_template(tokenizer, messages[:index], header=True) if index else ""
        _check_prompt(messages[:index], prompt)
        answer = _answer(tokenizer, messages[: index + 1], prompt)
        ids = encode(tokenizer, prompt)
        if ids[: len(tokens)] != tokens:
            conversations.append(Conversation(tokens, responses))
            responses = []
        tokens = ids + answer
        responses.append((len(ids), len(tokens)))
    return [*conversations, Conversation(tokens, responses)] if responses else []


def _check_prompt(messages: list[Message], prompt: str) -> None:
    """Raises RejectedChat where a prompt lacks the texts that it was rendered from."""
    if not messages:
        raise RejectedChat("The chat begins with the assistant: there is nothing to respond to.")
    written = _squeezed(prompt)
    for message in messages:
        if message["role"] in ("system", "user") and _squeezed(message["content"]) not in written:
            raise RejectedChat(f"The chat template drops or changes the text of a {message['role']} turn.")


def _answer(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: str) -> list[int]:
    """Ids of the last turn, from the end of ``prompt`` to its end-of-turn token."""
    text = messages[-1]["content"]
    whole = _apply_template(tokenizer, messages, header=False)
    # What surrounds the text is found with another text in its place: its own may hold anything, an end of turn too.
    around = _apply_template(tokenizer, [*messages[:-1], {**messages[-1], "content": PLACEHOLDER}], header=False)
    before, _, after = around.removeprefix(prompt).rpartition(PLACEHOLDER)
    answer = whole.removeprefix(prompt)
    if END_OF_THINKING in text and (answer == whole or _squeezed(text) not in _squeezed(answer)):
        answer = _as_generated(text, prompt) + after
    elif answer == whole:
        if prompt.rstrip().endswith(THINK):
            raise RejectedChat(
                "The chat template prompts for reasoning, and this answer has none: begin its text with "
                f"{THINK}...{END_OF_THINKING}, or use a template whose add_generation_prompt adds the assistant header alone."
            )
        raise RejectedChat(
            "The chat template begins an answered assistant turn in another way than the one it prompts for, so "
            "responses cannot be located; use a template whose add_generation_prompt adds the assistant header alone."
        )
    elif _squeezed(text) not in _squeezed(answer):
        raise RejectedChat("The chat template drops or changes the text of an assistant turn.")
    elif before.strip() and prompt == _apply_template(tokenizer, messages[:-1], header=False):
        raise RejectedChat(
            f"The chat template ignores add_generation_prompt: it begins an answer with {before!r} but does not prompt for "
            "one with it, so the header would be trained; use a template that writes it for add_generation_prompt=True."
        )
    if not answer.endswith(after):
        raise RejectedChat("The chat template ends this assistant turn in another way than others.")
    ids = encode(tokenizer, answer)
    return ids[: len(ids) - _behind_end_of_turn(tokenizer, after)]


def _as_generated(text: str, prompt: str) -> str:
    """What a model writes of an answer with reasoning: of its ``<think>`` what the prompt does not hold already."""
    opened = prompt.rpartition(THINK)
    if not opened[1] or opened[2].strip():
        return text
    return text.lstrip().removeprefix(THINK).removeprefix(opened[2])


def _squeezed(text: str) -> str:
    """A text without white space, which templates may trim."""
    return "".join(text.split())


@functools.lru_cache
def _behind_end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many tokens of what a template writes after an answer stand behind its first special one; 0 without one."""
    special = special_ids(tokenizer)
    ids = encode(tokenizer, text)
    end = next((index + 1 for index, token in enumerate(ids) if token in special), len(ids))
    return len(ids) - end


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes after an answer's text, up to its end-of-turn token.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.

    Returns:
        list[int]: ids, in nearly every template one; none where the template has no end-of-turn token.
    """
    chat: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PLACEHOLDER}]
    after = _apply_template(tokenizer, chat, header=False).rpartition(PLACEHOLDER)[2]
    ids = encode(tokenizer, after)
    ids = ids[: len(ids) - _behind_end_of_turn(tokenizer, after)]
    return ids if ids and ids[-1] in special_ids(tokenizer) else []


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are marks and no text: the special ones, and what was added to the vocabulary beside white space.

    Gemma's added tokens hold its newlines; Qwen's ``<tool_call>`` is added and not called special.
    """
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {i for i, token in added if token.special or token.content.strip()}


def show(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, longest: int = 400) -> str:
    """A conversation as text, for people to check: each response stands between ``>>>`` and ``<<<``.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer.
        conversation (Conversation): what is shown, up to the end of its last response.
        longest (int): characters of each piece; of a longer one the middle is left out.

    Returns:
        str: several lines; control characters (a terminal would obey them) are escaped.
    """
    pieces = []
    done = 0
    for start, end in conversation.responses:
        prompt, response = (
            _printable(str(tokenizer.decode(conversation.tokens[a:b])), longest)
            for a, b in ((done, start), (start, end))
        )
        pieces.append(f"{prompt}>>>{response}<<<")
        done = end
    return "".join(pieces)


def _printable(text: str, longest: int) -> str:
    if len(text) > longest:
        text = f"{text[: longest // 2]} […] {text[len(text) - longest // 2 :]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


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
    user: list[Message] = [{"role": "user", "content": "x"}]
    without = _apply_template(tokenizer, user, header=False)
    with_header = _apply_template(tokenizer, user, header=True)
    header = with_header.removeprefix(without)
    if not header or header == with_header:
        raise UserError(
            "The chat template writes no assistant header for add_generation_prompt=True, which the response-only "
            "view needs; use the instruct model's template, or set response_only: False."
        )
    ids = encode(tokenizer, header)
    # SmolLM2's BOS is the <|im_start|> that its header begins with already.
    if bos and ids[0] != tokenizer.bos_token_id and encode(tokenizer, without)[:1] == [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return tuple(ids)


def vocabulary_size(checkpoint_dir: str | Path) -> int:
    """Rows of a checkpoint's output head, read from its config.json (often more than the tokenizer has tokens)."""
    return json.loads((Path(checkpoint_dir) / "config.json").read_text())["vocab_size"]
