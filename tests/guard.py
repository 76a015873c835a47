"""A tiny guard model in the files of a Llama Guard 3: built by hand, so that what it says follows from single words.

" klaxify" in what it reads makes it say "unsafe" and S1, " pintoza" "unsafe" and S9, both S1; " mumble" words without end,
" hush" nothing, and anything else "safe".
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# As Llama 3 cuts text, so that two line breaks are one token.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTask: is there unsafe content in "
_TAIL = (
    "<END>\n\nOnly the last ' + role + ' message counts: \\'safe\\' or \\'unsafe\\'.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'User' if message['role'] == 'user' else 'Agent' %}"
)
# The 8 B guard's template takes plain text and fails on a list of parts; the 1 B and vision guards' drops plain text.
_ROLE = "{% set role = 'Agent' if messages|length % 2 == 0 else 'User' %}"
TEMPLATES = {
    "plain": f'{_ROLE}{{{{ "{_HEAD}\'" + role + "\' messages?\\n\\n" }}}}'
    f"{{% for message in messages %}}{_ALTERNATE}{{{{ role + ': ' + message['content'].strip() + '\\n\\n' }}}}{{% endfor %}}"
    f"{{{{ '{_TAIL}' }}}}",
    "parts": f'{_ROLE}{{{{- "{_HEAD}\'" + role + "\' messages?\\n\\n" -}}}}'
    f"{{%- for message in messages -%}}{_ALTERNATE}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'text') -%}"
    "{{- role + ': ' + content['text'] | trim + '\\n\\n' -}}{%- endfor -%}{%- endfor -%}"
    f"{{{{- '{_TAIL}' -}}}}",
}
MARKERS = (" klaxify", " pintoza", " mumble", " hush")


def tiny_guard(folder: Path, template: str) -> Path:
    """Writes the checkpoint.

    Args:
        folder (Path): to write to; a tokenizer that lies there is kept.
        template (str): a key of :data:`TEMPLATES`.

    Returns:
        Path: the folder.
    """
    if not (folder / "tokenizer.json").exists():
        _tokenizer().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        _build(model, lambda text: _single(tokenizer, text), tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    # As the vendor's file: sampling, which a judge must not do.
    transformers.GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.6, top_p=0.9).save_pretrained(folder)
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"\n\nsafe\n\nunsafe\nS1,S9 the{''.join(MARKERS)}"] * 4, trainer)
    # Like Meta's, without a pad token.
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=SPECIAL[0], eos_token="<|eot_id|>")


def _single(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> int:
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def _build(model: transformers.LlamaForCausalLM, token, eot: int) -> None:
    """Attention to all alike carries the markers to the last position; there the head chooses by them and the last token."""
    for parameter in model.parameters():
        parameter.zero_()
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(1)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    embed[:, 0] = 1
    for i, marker in enumerate(MARKERS):
        embed[token(marker), 1 + i] = 1
        layer.self_attn.v_proj.weight[i, 1 + i] = 1
        layer.self_attn.o_proj.weight[5 + i, i] = 2000  # dimensions 5 to 8: the markers, wherever they stood
    chain = ["<|end_header_id|>", "\n\n", "safe", "unsafe", "\n", "S", "1", "9", " the"]
    place = {text: 9 + i for i, text in enumerate(chain)}
    for text in chain:
        embed[token(text), place[text]] = 1
    after = [("<|end_header_id|>", "\n\n"), ("unsafe", "\n"), ("\n", "S"), (" the", " the")]
    after += [("\n\n", "safe"), ("\n\n", "unsafe"), ("\n\n", " the"), ("S", "1"), ("S", "9")]
    for last, following in after:
        head[token(following), place[last]] = 10_000
    for last in ("\n\n", "safe", "1", "9"):
        head[eot, place[last]] = 10_000
    head[token("safe"), 0] = 10  # unless a marker says more
    head[token("unsafe"), 5:7] = 1
    head[token(" the"), 7] = 10
    head[eot, 8] = 10
    head[token("1"), 5], head[token("9"), 6] = 10, 1
