"""Text in, numbered rows out; no jax below this package.

The path, one file a stage:

    documents.py    a source (file, folder, glob, hub name) -> documents
      records.py      what a document is, and which records are refused
      streams.py      bytes and lines of plain, .gz and .zst files, within bounds
      formats.py      .txt, .jsonl, .json and .parquet
      hub.py          Hugging Face datasets, on disk or on the hub (optional package `datasets`)
      python_docs.py  the English text that every Python carries
    tokenizer.py    text <-> ids, and what a Hugging Face folder needs; bpe.py trains one, chatml.jinja is its template
    cache.py        documents -> one memory-mapped stream of ids, tokenised once by workers.py
    rows.py         the stream -> fixed-length packed rows, by random access
    loader.py       rows -> shuffled, mixed batches that are a function of the step

Nothing is imported here, so that `import maxi.data` costs nothing.
"""
