"""Study whether the method works at the size of the embedded corpus, and which parts matter.

docs/study.md states the questions and the method. It was written before the first run.

    plan.py        arms, contrasts and sizes: everything that was decided in advance
    worlds.py      a world: a digit split, its teachers, scenes and caches; kept on disk
    run.py         a run: train both stages, evaluate; and the single pass over the test scenes
    queue.py       all runs, two at a time; resumes after an interruption
    results.py     the committed files of rows
    statistics.py  intervals, tests, corrections; worlds are the units
    summary.py     all reported figures, as report.json
    figures.py     plots
    page.py        the results part of docs/study.md

    PYTHONPATH=pipelines/digits python -m study run      # `make study`
"""
