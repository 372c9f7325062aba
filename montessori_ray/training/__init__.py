"""Training under Ray Train and DeepSpeed: chat formatting and label masks, student fine-tuning, teacher tuning."""
