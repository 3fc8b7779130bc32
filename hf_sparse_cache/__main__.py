"""`python -m hf_sparse_cache`, for where the script is not on the path."""

from .cli import main


main()
