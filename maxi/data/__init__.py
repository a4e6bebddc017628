"""Text in, numbered rows out; no jax below this package.

The path, one file a stage:

    documents.py      a source (file, folder, glob, hub name) -> documents, or records
      records.py        what a document is, and which records are refused
      streams.py        bytes and lines of plain, .gz and .zst files, within bounds
        patient.py        a read that fails for a moment is tried again
      formats.py        .txt, .jsonl, .json (json_text.py) and .parquet (parquet.py)
      hub.py            Hugging Face datasets, on disk or on the hub (optional package `datasets`)
      python_docs.py    the English text that every Python carries, also as questions and preferences
    messages.py       records -> conversations, preferences, labelled answers
    chat_template.py  conversations -> text, and which parts of it the model must say
      template_worker.py  what renders; for foreign templates in a child process
    tokenizer.py      text <-> ids; bpe.py trains one, chatml.jinja is its template, tokenizer_folder.py writes its files
      tokenizer_trial.py  a child process that meets it first; tokenizer_memory.py keeps what transformers made of it
    cache.py          a source -> ids, made once and memory-mapped
      texts.py          ... of documents, tokenised by workers.py
      examples.py       ... of conversations, with the mask; audit.py finds out whether it is right
    rows.py           documents -> packed rows of equal length, by random access
    sample_rows.py    conversations and pairs -> the same, whole; packing.py says which share a row
    loader.py         rows -> shuffled, mixed batches that are a function of the step
      skipping.py       which of them no step reads

Beside it, for evaluations: windows.py (documents, every token's document known) and prompts.py (what to continue).

Nothing is imported here, so that `import maxi.data` costs nothing.
"""
