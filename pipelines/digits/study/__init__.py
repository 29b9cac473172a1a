"""The study: does the method work at the size of the embedded corpus, and which parts of it.

docs/study.md says what is asked and how it is answered, and was written before the first run.

    plan.py        arms, contrasts, sizes: everything that is decided beforehand
    worlds.py      a digit split, teachers trained on it, scenes, caches; kept on disk
    run.py         one run: train both stages, evaluate; and the one look at the test scenes
    queue.py       all runs, two at a time, one row each; goes on where it was interrupted
    results.py     the committed files of rows
    statistics.py  intervals, tests, corrections: worlds are the units
    summary.py     everything that is reported, as report.json
    figures.py     the figures
    page.py        the results part of docs/study.md

    PYTHONPATH=pipelines/digits python -m study run      # `make study`
"""
