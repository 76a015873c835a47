"""Tiny checkpoints for the tests: a small BPE tokenizer and randomly initialised models in Hugging Face format."""

import functools
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% if bos %}{{ bos_token }}{% endif %}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]
VOCABULARY = 400
TEXTS = (
    "I cannot help with that request.",
    "I'm sorry, but I can't assist with that.",
    "Sure, here is how to paint the fence: sand the wood, then add two thin coats.",
    "How do I paint the fence? What is the best way to clean a window?",
    "Is this review positive or negative? The film was superb. What a dull plot. positive negative",
    "What is seven plus nine? The answer is 16. user assistant system",
    "As an AI language model, I won't provide or explain such content; it could be harmful or illegal.",
)
ARCHITECTURES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
}


@functools.cache
def _bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)
    return bpe.to_str()


def tiny_tokenizer(directory: str | Path, bos: bool = False) -> Path:
    """Writes a byte-level BPE tokenizer of at most 400 tokens with a ChatML template.

    Args:
        directory (str | Path): the folder to write to.
        bos (bool): let the chat template begin with a BOS token.

    Returns:
        Path: the folder.
    """
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        bos_token="<|begin|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE.replace("{% if bos %}", "{% if true %}" if bos else "{% if false %}"),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return Path(directory)


def tiny_model(
    directory: str | Path,
    architecture: str = "qwen2",
    seed: int = 0,
    tied: bool = True,
    vocab_size: int | None = None,
    bos: bool = False,
    **config,
) -> Path:
    """Writes a complete checkpoint folder: config, random fp32 weights, generation config and tokenizer.

    Args:
        directory (str | Path): the folder to write to; a tokenizer that lies there already is kept.
        architecture (str): "qwen2", "llama" or "gemma2".
        seed (int): of the weights.
        tied (bool): share the embedding with the output head.
        vocab_size (int | None): rows of the embedding, more than the tokenizer has for a padded vocabulary; default: as
            many as the tokenizer has.
        bos (bool): see :func:`tiny_tokenizer`.
        **config: any other field of the architecture's config.

    Returns:
        Path: the folder.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        tiny_tokenizer(directory, bos)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    config_class, model_class = ARCHITECTURES[architecture]
    fields = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # far enough from uniform that tokens differ
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**fields | config)).to(getattr(torch, config.get("dtype", "float32")))
    model.save_pretrained(directory)
    return directory
