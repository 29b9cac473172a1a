"""Study whether the method works at the size of the embedded corpus, and which parts matter.

docs/study.md and docs/twelve-worlds.md state the questions and the method. They were written before
the first runs.

    plan.py        the first study: arms, contrasts and sizes, decided in advance
    plan_twelve.py the same of the study with twelve worlds
    worlds.py      a world: a digit split, its teachers, scenes and caches; kept on disk
    controls.py    the caches of control arms
    run.py         a run: train both stages, evaluate; and the single pass over the test scenes
    answers.py     a student's answers, and a probe of its encoder
    queue.py       all runs, two at a time; resumes after an interruption
    processes.py   the processes that it uses
    explore.py     runs outside the plan; tune.py: those that tune the official recipe
    results.py     the committed files of rows
    statistics.py  intervals, tests, corrections; worlds are the units
    summary.py, codec_report.py, twelve_report.py   all reported figures, as report.json
    figures.py, page.py, twelve_page.py             plots and the results parts of the pages

    PYTHONPATH=pipelines/digits python -m study run      # `make study`
"""
