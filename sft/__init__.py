"""raysft's training library: raw rows in, a LoRA adapter bundle out."""
