"""Names, shapes and files of other people's formats: Hugging Face directories."""
