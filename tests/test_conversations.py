"""Which tokens of a chat are responses, and what their response-only views are."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from transformers import AddedToken, AutoModelForCausalLM

from pact_tune import UserError, load_tokenizer
from pact_tune.batching import collate, response_only_views
from pact_tune.conversations import (
    Conversation,
    RejectedChat,
    encode,
    end_of_turn,
    render,
    render_prompt,
    render_turns,
    response_only_prefix,
    show,
    special_ids,
    tokenizer_fingerprint,
    vocabulary_size,
)

DATA = os.environ.get("PACT_TUNE_TEST_DATA")
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Like Qwen2.5's: a system message of its own where the chat has none.
DEFAULT_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a language model.<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE.replace("{% if bos %}{{ bos_token }}{% endif %}", "")
)
# Like Qwen3's: the last answer begins with its reasoning, an empty one where it has none; earlier ones lose theirs.
REASONING_TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] + '\\n' }}"
    "{%- set text = m['content'].split('</think>')[-1].lstrip('\\n') -%}"
    "{%- set reasoning = m['content'].split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m['content'] else '' -%}"
    "{%- if m['role'] == 'assistant' and loop.last -%}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ text + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# SmolLM2's: BOS is the <|im_start|> that every turn begins with.
SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Gemma's: the assistant is "model", texts are trimmed.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
# No token ends a turn.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Like Gemma's: no system message, and the roles take turns.
STRICT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
USER = {"role": "user", "content": "How do I paint the fence?"}
ANSWER = {"role": "assistant", "content": "Sand the wood, then add two thin coats."}
SYSTEM = {"role": "system", "content": "As an AI language model, answer."}
CHATS = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "several turns": [USER, ANSWER, {"role": "user", "content": "And a window?"}, {"role": "assistant", "content": "Water."}],
    "system and several": [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "I cannot help with that."}],
    "two answers in a row": [USER, ANSWER, {"role": "assistant", "content": "Then wait."}],
    "not ASCII": [{"role": "user", "content": "Wie geht's? 你好 🙂"}, {"role": "assistant", "content": "Größe: 3 µm\n\n- a\n- b 🎉"}],
}  # fmt: skip


def ids(result) -> list[int]:
    """What `apply_chat_template(tokenize=True)` returns, in transformers 4 and 5."""
    return list(result if isinstance(result, list) else result["input_ids"])


def of_template(folder: Path, template: str, bos: bool = False):
    tokenizer = load_tokenizer(str(tiny_tokenizer(folder, bos)))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=["chatml", "llama", "default system", "real qwen2.5", "real llama3"])
def tokenizer(request, tmp_path_factory):
    if request.param.startswith("real"):
        if DATA is None:
            pytest.skip("PACT_TUNE_TEST_DATA is not set")
        return load_tokenizer(str(Path(DATA) / "tokenizers" / f"{request.param.removeprefix('real ')}-hf"))
    templates = {"chatml": CHAT_TEMPLATE, "llama": LLAMA_TEMPLATE, "default system": DEFAULT_SYSTEM_TEMPLATE}
    template = templates[request.param]
    return of_template(tmp_path_factory.mktemp("tokenizer"), template, bos=template == LLAMA_TEMPLATE)


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_are_the_templates_and_responses_are_the_answers(tokenizer, chat):
    """The ids are those of the whole chat tokenized at once; each response is answer + end of turn, and no more."""
    messages = CHATS[chat]
    conversation = render(tokenizer, messages)
    whole = ids(tokenizer.apply_chat_template(messages, tokenize=True))
    assert conversation.tokens == whole[: len(conversation.tokens)]
    # Only what follows the end of the last turn is left out: nothing, or ChatML's newline.
    assert tokenizer.decode(whole[len(conversation.tokens) :]).strip() == ""

    answers = [(i, m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(conversation.responses) == len(answers)
    for (start, end), (index, content) in zip(conversation.responses, answers, strict=True):
        # Llama 3's template trims, ordinary contents have nothing to trim
        assert conversation.tokens[start:end] == [*encode(tokenizer, content), tokenizer.eos_token_id]
        assert conversation.tokens[:start] == render_prompt(tokenizer, messages[:index])
    assert conversation.responses[-1][1] == len(conversation.tokens)
    assert conversation.num_response_tokens == sum(end - start for start, end in conversation.responses)


def test_the_newline_after_the_end_of_turn_is_not_the_responses(tmp_path):
    """Of the first turn it stands in the tokens, between its response and the next prompt."""
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE)
    conversation = render(tokenizer, CHATS["several turns"])
    (_, first_end), (second_start, second_end) = conversation.responses
    assert tokenizer.decode(conversation.tokens[first_end - 1 : first_end + 2]) == "<|im_end|>\n<|im_start|>"
    assert tokenizer.decode(conversation.tokens[second_start:]) == "Water.<|im_end|>"
    assert tokenizer.decode(conversation.tokens[first_end:second_start]).endswith("<|im_start|>assistant\n")


def test_a_default_system_prompt_is_part_of_the_prompt(tmp_path):
    tokenizer = of_template(tmp_path, DEFAULT_SYSTEM_TEMPLATE)
    without, own = render(tokenizer, CHATS["one turn"]), render(tokenizer, CHATS["system"])
    assert "You are a language model." in tokenizer.decode(without.tokens)
    assert "You are a language model." not in tokenizer.decode(own.tokens)
    assert SYSTEM["content"] in tokenizer.decode(own.tokens)
    answers = [c.tokens[slice(*c.responses[0])] for c in (without, own)]
    assert answers[0] == answers[1]


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tmp_path):
    """Llama 3.2's does, and fills in today unless it is told otherwise."""
    dated = "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    tokenizer = of_template(tmp_path, dated + "<|im_start|>Today Date: {{ date_string }}<|im_end|>\n" + CHAT_TEMPLATE)
    assert "26 Jul 2024" not in tokenizer.apply_chat_template([USER], tokenize=False)
    text = "<|im_start|>Today Date: 26 Jul 2024<|im_end|>\n<|im_start|>user\n"
    for tokens in (render(tokenizer, CHATS["one turn"]).tokens, render_prompt(tokenizer, [USER])):
        assert tokenizer.decode(tokens).startswith(text)


def test_no_token_straddles_header_and_response(tmp_path):
    """A response that begins with what the header ends with keeps a token of its own, as when a model answers."""
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE)
    messages = [USER, {"role": "assistant", "content": "\n\nYes."}]
    conversation = render(tokenizer, messages)
    ((start, end),) = conversation.responses
    assert conversation.tokens[:start] == render_prompt(tokenizer, [USER])
    assert tokenizer.decode(conversation.tokens[start:end]) == "\n\nYes.<|im_end|>"


@pytest.mark.parametrize(
    "turn",
    [{"content": ""}, {"content": " \n"}, {"content": "Hm.", "tool_calls": [{"function": {"name": "f"}}]},
     {"content": "Hm.", "weight": 0}],
)  # fmt: skip
def test_turns_that_are_no_responses_are_context(tokenizer, turn):
    """An empty turn or a tool call would teach silence, and a weight of 0 says so."""
    turn = {"role": "assistant", **turn}
    assert render(tokenizer, [USER, turn]) == Conversation([], [])
    conversation = render(tokenizer, [USER, turn, USER, ANSWER, turn])
    ((start, end),) = conversation.responses
    assert conversation.tokens[:start] == render_prompt(tokenizer, [USER, turn, USER])
    assert tokenizer.decode(conversation.tokens[start:]).startswith(ANSWER["content"]) and end == len(
        conversation.tokens
    )


def test_a_chat_without_an_answer_has_no_response(tokenizer):
    assert render(tokenizer, [USER]) == Conversation([], [])
    trailing = render(tokenizer, [USER, ANSWER, USER])  # nothing answers the last turn: it is left out
    assert trailing == render(tokenizer, [USER, ANSWER])


def test_a_template_without_an_end_of_turn_token_gives_the_whole_text_to_the_response(tmp_path):
    tokenizer = of_template(tmp_path, PLAIN_TEMPLATE)
    for content in (ANSWER["content"], "Write <|im_end|> there."):  # as text it ends nothing
        conversation = render(tokenizer, [USER, {"role": "assistant", "content": content}])
        ((start, end),) = conversation.responses
        assert tokenizer.decode(conversation.tokens[start:end]) == content + "\n"
    assert end_of_turn(tokenizer) == []


@pytest.mark.parametrize("template", ["chatml", "gemma"])
def test_the_end_of_turn_is_what_the_template_writes_after_the_text(tmp_path, template):
    """Neither a newline that was added to the vocabulary (Gemma's) nor an end of turn in the text itself is one."""
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE if template == "chatml" else GEMMA_TEMPLATE, bos=True)
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    newline, end_token = tokenizer.convert_tokens_to_ids("\n"), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(tokenizer) == [end_token] and newline not in special_ids(tokenizer)
    content = "One.\nTwo: <|im_end|> ends a turn.\nThree."
    conversation = render(tokenizer, [USER, {"role": "assistant", "content": content}, USER, ANSWER])
    (start, end), _ = conversation.responses
    assert tokenizer.decode(conversation.tokens[start:end]) == content + "<|im_end|>"
    assert conversation.tokens[end - 1 : end + 1] == [end_token, newline]
    assert conversation.tokens[start:end].count(newline) == 2


def test_the_first_token_that_ends_a_turn_ends_the_response(tmp_path):
    """Phi-3 ends a turn with <|end|>, and the whole text with end-of-text unless it prompts."""
    template = CHAT_TEMPLATE.replace("{%- endif -%}", "{%- else -%}<|endoftext|>{%- endif -%}")
    tokenizer = of_template(tmp_path, template)
    conversation = render(tokenizer, CHATS["several turns"])
    ends = [tokenizer.decode(conversation.tokens[end - 1]) for _, end in conversation.responses]
    assert ends == ["<|im_end|>"] * 2 and "<|endoftext|>" not in tokenizer.decode(conversation.tokens)


# Templates that rewrite ----------------------------------------------------------------------------------------------


def test_a_template_that_drops_earlier_reasoning_gives_one_conversation_a_turn(tmp_path):
    """As a server of Qwen3 does: earlier turns without reasoning are the prompt, and each response is trained once."""
    tokenizer = of_template(tmp_path, REASONING_TEMPLATE)
    reasoned = {"role": "assistant", "content": "<think>\nWet.\n</think>\n\nWater."}
    chat = [USER, reasoned, USER, ANSWER]
    first, second = render_turns(tokenizer, chat)
    answers = ["<think>\nWet.\n</think>\n\nWater.<|im_end|>", f"<think>\n\n</think>\n\n{ANSWER['content']}<|im_end|>"]
    for conversation, messages, answer in ((first, chat[:1], answers[0]), (second, chat[:3], answers[1])):
        ((start, end),) = conversation.responses
        assert conversation.tokens[:start] == render_prompt(tokenizer, messages) and end == len(conversation.tokens)
        assert tokenizer.decode(conversation.tokens[start:]) == answer
    assert "Wet." not in tokenizer.decode(second.tokens) and "Water." in tokenizer.decode(second.tokens)
    assert render(tokenizer, chat[:2]) == first
    with pytest.raises(UserError, match="this chat is 2 texts and not one"):
        render(tokenizer, chat)


@pytest.mark.parametrize("prompts", [False, True])
def test_reasoning_that_a_template_drops_from_all_turns_is_trained_as_it_is_generated(tmp_path, prompts):
    """DeepSeek R1's template is written for the history; a later one prompts with <think>, too."""
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    if prompts:
        template = template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    tokenizer = of_template(tmp_path, template)
    texts = ["<think>\nWet.\n</think>\n\nWater.", "<think>\nDry.\n</think>\n\nSand."]
    chat = [USER, {"role": "assistant", "content": texts[0]}, USER, {"role": "assistant", "content": texts[1]}]
    conversations = render_turns(tokenizer, chat)
    for conversation, messages, text in zip(conversations, (chat[:1], chat[:3]), texts, strict=True):
        ((start, end),) = conversation.responses
        assert conversation.tokens[:start] == render_prompt(tokenizer, messages) and end == len(conversation.tokens)
        generated = text.removeprefix("<think>\n") if prompts else text
        assert tokenizer.decode(conversation.tokens[start:]) == generated + "<|im_end|>"
    assert "Wet." not in tokenizer.decode(conversations[1].tokens)
    if prompts:
        with pytest.raises(RejectedChat, match="prompts for reasoning, and this answer has none"):
            render_turns(tokenizer, [USER, ANSWER])
    else:
        assert render(tokenizer, [USER, ANSWER]).responses


@pytest.mark.parametrize(
    ("change", "role", "chat"),
    [
        ("(message['content'] | tojson)", "assistant", [USER, {"role": "assistant", "content": 'Say "no".'}]),
        ("('' if message['role'] == 'system' else message['content'])", "system", [SYSTEM, USER, ANSWER]),
        ("message['content'][:20]", "user", [USER, {"role": "assistant", "content": "Yes."}]),
    ],
)  # fmt: skip
def test_a_chat_whose_text_is_not_in_its_rendering_is_rejected(tmp_path, change, role, chat):
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE.replace("message['content']", change))
    with pytest.raises(RejectedChat, match=f"drops or changes the text of an? {role} turn"):
        render(tokenizer, chat)
    assert render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]).responses


def test_a_template_that_ignores_the_generation_prompt_is_refused(tmp_path):
    """It would have its header trained; one without any header (Mistral's) has nothing to ignore."""
    ignoring = CHAT_TEMPLATE.split("{%- if add_generation_prompt")[0]
    with pytest.raises(RejectedChat, match=r"ignores add_generation_prompt.*'<\|im_start\|>assistant\\n'"):
        render(of_template(tmp_path / "ignoring", ignoring), CHATS["one turn"])
    mistral = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = of_template(tmp_path / "mistral", mistral)
    conversation = render(tokenizer, CHATS["several turns"])
    answers = [tokenizer.decode(conversation.tokens[slice(*span)]) for span in conversation.responses]
    assert answers == [f" {ANSWER['content']}<|im_end|>", " Water.<|im_end|>"]


def test_a_conversation_is_shown_with_its_responses_marked(tmp_path):
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE)
    answers = ["Red\x1b[31m.\nÄ", "word " * 300]
    chat = [turn for content in answers for turn in (USER, {"role": "assistant", "content": content})]
    text = show(tokenizer, render(tokenizer, chat))
    user = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert text.startswith(f"{user}>>>Red\\x1b[31m.\nÄ<|im_end|><<<\n{user}>>>word word ")
    assert text.endswith("word <|im_end|><<<") and " […] " in text and len(text) < 1000


# The response-only view ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_the_response_only_prefix_is_the_assistant_header(tmp_path, bos):
    """With BOS in front where the template begins with it, unless it is switched off."""
    chatml = of_template(tmp_path / "chatml", CHAT_TEMPLATE)
    header = encode(chatml, "<|im_start|>assistant\n")
    assert response_only_prefix(chatml, bos) == tuple(header)
    llama = of_template(tmp_path / "llama", LLAMA_TEMPLATE, bos=True)
    header = encode(llama, "<|im_start|>assistant\n\n")
    assert response_only_prefix(llama, bos) == tuple([llama.bos_token_id] * bos + header)
    smollm = of_template(tmp_path / "smollm", SMOLLM_TEMPLATE)
    smollm.bos_token = "<|im_start|>"
    header = encode(smollm, "<|im_start|>assistant\n")
    assert response_only_prefix(smollm, bos) == tuple(header) and header[0] == smollm.bos_token_id
    unused = of_template(tmp_path / "unused", CHAT_TEMPLATE, bos=True)  # a BOS token that the template does not write
    assert response_only_prefix(unused, bos) == tuple(encode(unused, "<|im_start|>assistant\n"))


@pytest.mark.parametrize(
    ("name", "header", "bos"),
    [
        ("qwen2.5", "<|im_start|>assistant\n", []),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", [128000]),
    ],
)
@pytest.mark.skipif(DATA is None, reason="PACT_TUNE_TEST_DATA is not set")
def test_the_response_only_prefix_of_real_tokenizers(name, header, bos):
    real = load_tokenizer(str(Path(DATA) / "tokenizers" / f"{name}-hf"))
    assert response_only_prefix(real) == (*bos, *encode(real, header))
    assert response_only_prefix(real, bos=False) == tuple(encode(real, header))


def test_the_header_stands_before_every_response(tokenizer):
    """The prefix without BOS is what precedes each response in the whole chat, whatever the prompt."""
    prefix = list(response_only_prefix(tokenizer, bos=False))
    for messages in CHATS.values():
        conversation = render(tokenizer, messages)
        for start, _ in conversation.responses:
            assert conversation.tokens[start - len(prefix) : start] == prefix


def test_a_template_without_an_assistant_header_has_no_response_only_view(tmp_path):
    tokenizer = of_template(tmp_path, "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="no assistant header.*response_only: False"):
        response_only_prefix(tokenizer)


def test_the_response_only_view_does_not_change_with_the_prompt(tokenizer):
    prefix = response_only_prefix(tokenizer)
    prompts = ([USER], [SYSTEM, USER], [*CHATS["several turns"], {"role": "user", "content": "Why?"}])
    chats = [render(tokenizer, [*prompt, ANSWER]) for prompt in prompts]
    views = [response_only_views(chat, prefix, None)[-1] for chat in chats]
    assert views[0] == views[1] == views[2]
    assert views[0].tokens == [*prefix, *encode(tokenizer, ANSWER["content"]), tokenizer.eos_token_id]
    assert len({tuple(chat.tokens) for chat in chats}) == 3


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_logits_before_a_token_predict_it(tmp_path, architecture):
    """What a model writes greedily after the bare header, token t has the largest logit at index header - 1 + t."""
    folder = tiny_model(tmp_path, architecture, seed=1)
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    prefix = list(response_only_prefix(tokenizer))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(torch.tensor([prefix]), **options)[0, len(prefix) :].tolist()
    assert len(answer) == 12 and len(set(answer)) > 2, "a constant answer would hide a shift"
    prompt = render_prompt(tokenizer, [USER])
    chat = Conversation(prompt + answer, [(len(prompt), len(prompt) + 12)])
    batch = collate(response_only_views(chat, prefix, None), tokenizer.pad_token_id)
    assert batch.index.tolist() == [len(prefix) - 1 + t for t in range(12)]
    with torch.no_grad():
        logits = model(batch.tokens).logits.flatten(0, 1)[batch.index]
    assert logits.argmax(-1).tolist() == batch.labels.tolist() == answer


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_generation_prompt_that_answered_turns_lack_is_refused(tmp_path):
    tokenizer = of_template(tmp_path, CHAT_TEMPLATE.replace("assistant\\n", "assistant\\nAnswer: "))
    with pytest.raises(UserError, match="begins an answered assistant turn in another way"):
        render(tokenizer, CHATS["one turn"])


@pytest.mark.parametrize(
    ("messages", "why"),
    [([SYSTEM, USER, ANSWER], "System role not supported"), ([USER, USER, ANSWER], "Roles must alternate"),
     ([ANSWER, USER, ANSWER], "begins with the assistant")],
)  # fmt: skip
def test_a_chat_that_the_template_does_not_take_is_rejected(tmp_path, messages, why):
    tokenizer = of_template(tmp_path, STRICT_TEMPLATE)
    assert render(tokenizer, CHATS["several turns"]).responses
    with pytest.raises(RejectedChat, match=why):
        render(tokenizer, messages)
    if messages[0] is SYSTEM:
        with pytest.raises(RejectedChat, match=why):
            render_prompt(tokenizer, [SYSTEM, USER])


def test_a_template_that_stumbles_over_a_chat_rejects_it(tmp_path):
    """DeepSeek's takes the arguments of a tool call for text."""
    stumbling = "{% for m in messages %}{% for c in m['tool_calls'] or [] %}{{ 'x' + c['function']['arguments'] }}{% endfor %}{% endfor %}"
    tokenizer = of_template(tmp_path, stumbling + CHAT_TEMPLATE)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    with pytest.raises(RejectedChat, match="does not take this chat: can only concatenate str"):
        render(tokenizer, [USER, call, {"role": "tool", "content": "3"}, ANSWER])


# Tokenizers ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template; use the instruct model's tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("damage", ["missing", "empty object", "cut off"])
def test_a_missing_or_damaged_tokenizer_is_one_sentence(tmp_path, damage):
    folder = tiny_tokenizer(tmp_path / "model")
    file = folder / "tokenizer.json"
    if damage == "missing":
        shutil.rmtree(folder)
    else:
        file.write_text("{}" if damage == "empty object" else file.read_text()[:1000])
    with pytest.raises(UserError) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(").")


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_there_is_always_a_pad_token(tmp_path, eos):
    """The end of turn where there is none, and any token where there is no end of turn either."""
    folder = tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<|endoftext|>"  # its own is kept
    tokenizer.pad_token = None
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(folder)
    again = load_tokenizer(str(folder))
    assert again.pad_token_id == (tokenizer.eos_token_id if eos else 0)


def test_the_fingerprint_follows_what_ids_mean(tmp_path):
    one, same = (load_tokenizer(str(tiny_tokenizer(tmp_path / name))) for name in ("one", "same"))
    other = load_tokenizer(str(tiny_tokenizer(tmp_path / "other")))
    same.chat_template = LLAMA_TEMPLATE  # not a matter of ids
    other.add_tokens(["fence!"])
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


def test_vocabulary_size_is_the_heads(tmp_path):
    assert vocabulary_size(tiny_model(tmp_path, vocab_size=448)) == 448
