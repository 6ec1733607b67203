"""LoRA weights of any origin, as evaluation and export need them."""
