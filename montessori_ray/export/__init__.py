"""A run's datasets and models as others use them: a Hugging Face dataset folder and model folders, with cards."""
