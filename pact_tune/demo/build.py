"""Build the demo family: a byte-level BPE tokenizer, a small Qwen2 base model and, from it, an aligned one.

    python -m pact_tune.demo.build OUTPUT_DIR [--architecture qwen2|llama|gemma2]

writes `OUTPUT_DIR/base` and `OUTPUT_DIR/aligned` in Hugging Face format, and the data of seed 0 to `OUTPUT_DIR/data`.
About a minute and a half on two cores; the package ships the result, so this is needed only after a change of
`pact_tune.demo.generator`.
"""

import argparse
import pathlib

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pact_tune import log
from pact_tune.conversations import render
from pact_tune.demo import generator
from pact_tune.log import progress

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
VOCAB_SIZE = 800
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
IGNORED = -100
BASE_STEPS = 360
ALIGNED_STEPS = 120
BATCH_SIZE = 48
ARCHITECTURES = {  # transformers' name -> what its config has beside the common sizes
    "qwen2": {"use_sliding_window": False},
    "llama": {},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 128},
}


def build_tokenizer(rows):
    """Train the tokenizer on chats and return it as a transformers tokenizer with a ChatML template and no BOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ["\n".join(["user", generator.request_of(row), "assistant", generator.answer_of(row)]) for row in rows]
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, seed, architecture):
    """Return a randomly initialised model of 0.9 M parameters, in float32."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[architecture],
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def encode(tokenizer, rows, response_only):
    """Return one (ids, labels) pair of int lists a row; labels cover the response, or everything."""
    encoded = []
    for row in rows:
        chat = render(tokenizer, row["messages"])
        start = chat.responses[0][0]
        labels = [IGNORED] * start + chat.tokens[start:] if response_only else chat.tokens
        encoded.append((chat.tokens, labels))
    return encoded


def pad_batch(pairs, pad_id):
    """Return (ids, labels, attention mask), each [batch, longest], padded on the right."""
    length = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in pairs])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in pairs])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in pairs])
    return ids, labels, mask


def train(model, encoded, learning_rate, pad_id, name):
    """Train all weights for one pass over `encoded` (one-cycle learning rate, AdamW); `name` is for the progress bar."""
    batches = [encoded[i : i + BATCH_SIZE] for i in range(0, len(encoded), BATCH_SIZE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, len(batches), pct_start=0.1)
    model.train()
    with progress(total=len(batches), desc=name, unit="step") as bar:
        for pairs in batches:
            ids, labels, mask = pad_batch(pairs, pad_id)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            bar.update(1)
    model.eval()


def save(model, tokenizer, folder):
    """Write model and tokenizer; the weights go to disk in bfloat16 and `model` stays as it was."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_demo_family(output_dir, seed=0, architecture="qwen2"):
    """Build the family and return the folder that holds `base/`, `aligned/` and `data/`.

    Args:
        output_dir: folder to write to; made if absent.
        seed: seed of the data, of the initialisation and of the order.
        architecture: one of ARCHITECTURES; the package ships the Qwen2.
    """
    folder = pathlib.Path(output_dir)
    base_rows = generator.base_rows(seed, BASE_STEPS * BATCH_SIZE)
    aligned_rows = generator.aligned_rows(seed, ALIGNED_STEPS * BATCH_SIZE)
    tokenizer = build_tokenizer(base_rows[:4000] + aligned_rows[:2000])
    model = build_model(tokenizer, seed, architecture)
    pad_id = tokenizer.pad_token_id
    train(model, encode(tokenizer, base_rows, response_only=False), 4e-3, pad_id, "Base model")
    save(model, tokenizer, folder / "base")
    train(model, encode(tokenizer, aligned_rows, response_only=True), 1e-3, pad_id, "Aligned model")
    save(model, tokenizer, folder / "aligned")
    generator.write_demo_data(folder / "data", seed=0)
    return folder


def main():
    """Command line: one argument, the output folder."""
    parser = argparse.ArgumentParser(description="Build the demo family (base and aligned model).")
    parser.add_argument("output_dir", type=pathlib.Path, help="folder for base/ and aligned/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen2")
    arguments = parser.parse_args()
    log.setup()
    print(build_demo_family(arguments.output_dir, arguments.seed, arguments.architecture))


if __name__ == "__main__":
    main()
