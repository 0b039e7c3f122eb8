"""From a finished trial to a folder that Hugging Face's transformers loads without this project."""
