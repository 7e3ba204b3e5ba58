"""Many texts, many workers: ``statescope batch``.

================== =====================================================================================
``inputs``         rows of JSONL, CSV, Parquet, folders of text files and datasets, checked
``manifest``       what became of every text: an SQLite file that only the parent writes
``places``         where records go: a folder or any fsspec URL
``settings``       what is asked of the workers
``work``           what a worker does: reads texts together, writes each a record of its own
``drafts``         where a record is put together; a long text's outlives its worker
``held``           keeps a worker's memory flat
``cluster``        Dask's workers: here, one for each GPU, or those of a running cluster
``engine``         hands out work, survives workers, writes down what comes back
``command``        one run, from inputs to its summary; ``estimate`` for a dry one
``collection``     all records of a run as one object
================== =====================================================================================
"""
