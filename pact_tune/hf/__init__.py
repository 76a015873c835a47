"""What touches Hugging Face transformers beyond its tokenizers."""
