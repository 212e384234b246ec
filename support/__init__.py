"""The plumbing of part 2 and later: files, folders and machines, so that the scripts needn't care.

    runs.py          the folder of a run, Ctrl-C, and the command that continues it
    checkpoints.py   writing and reading checkpoints
    hardware.py      what the machine can do
    processes.py     the processes that torchrun starts
    model_files.py   models in the folders of transformers: downloads, weights, exports
    gpt2_files.py    what is special about those of GPT-2 and GPT-1
    llama_files.py   what is special about those of Llama, Mistral and Qwen3
"""
