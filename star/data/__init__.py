"""Text for training: sources, tokens, and a memory-mapped corpus split by document.

corpus = open_corpus()                                   # the Python standard library, as bytes
corpus = open_corpus("books/", tokenizer="bpe.json")
inputs, targets = corpus.batch(step, batch_size=8, length=256, seed=0)
"""

from star.data.cache import default_cache_directory, open_corpus
from star.data.corpus import Corpus, load_corpus
from star.data.errors import DataError

__all__ = ["Corpus", "DataError", "default_cache_directory", "load_corpus", "open_corpus"]
