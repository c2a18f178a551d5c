"""The only room that imports transformers: loading, attaching, the cache adapter."""
