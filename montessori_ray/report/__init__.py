"""What a run did, for people: one self-contained HTML page and, in `report.json`, every number on it.

`source.py` reads the run directory, `collect.py` makes plain values of it, `plots.py` draws them, `run_page.py` lays
them out with the blocks of `html.py`.
"""
