"""The plumbing of part 2 and later, so that the scripts can be about their lessons.

    runs.py          the folder of a run, Ctrl-C, and the command that continues it
    checkpoints.py   writing and reading checkpoints
    hardware.py      what the machine can do
    processes.py     the processes that torchrun starts
    model_files.py   models as transformers stores them: downloads, weights, exports
    gpt2_files.py    the settings of GPT-2 and GPT-1 in such files
    llama_files.py   the settings and tokenizers of Llama, Mistral and Qwen3
"""
