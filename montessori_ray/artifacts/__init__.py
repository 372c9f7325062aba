"""The run directory: Parquet datasets, model directories, manifests, atomic commits, resume (DESIGN section 5)."""
