"""Found models as directories that others can load.

`write.export` puts one together; `directory` is its layout, read and written without transformers;
`tokenizer`, `card` and `native` make its parts.
"""
