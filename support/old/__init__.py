"""The runs of parts 4, 6 and 7, whose training loop is still the one from before train_step.

    runs.py          the folder of a run, Ctrl-C, and the command that continues it
    checkpoints.py   writing and reading checkpoints
"""
