"""A Hugging Face Space: what each speed of a model gives and saves."""

import os

from fastbert_hf.serving.loading import load_pipeline
from fastbert_hf.serving.page import show_page


# In the settings of the Space: a name on the Hub, such as org/my-fastbert-model. The package's own model unless set.
page = show_page(load_pipeline(os.environ.get("FASTBERT_MODEL") or None))
print(f"The page is at {page.local_url} until Ctrl-C.", flush=True)
page.block_thread()
