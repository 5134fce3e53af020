"""`benchmark.py record`: what a machine can tell about fasttrain, within a time limit.

command.py      the options, the stages, and the time that each gets
journal.py      the files of a record, and what the stages share
machine.py      the stage `machine`         images.py     the stage `input`
gpu_tests.py    the stage `tests`           packed.py     parts of the path of raw images
updates.py      `step`, `profile`, `operators`, `loop`
training.py     the stages `train` and `imagenette`
traffic.py      the stage `traffic`
tables.py       the lines of a record as Markdown
commands.py     commands whose output goes to a file
share_tests.py  a plugin of pytest: several processes share the tests
"""
