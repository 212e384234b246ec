"""The plumbing of part 2 and later, so that the scripts can be about their lessons.

    runs.py          where a run starts from, its folder and its files, and Ctrl-C
    checkpoints.py   reading checkpoints, and what is wrong with one
    batches.py       batches that can be repeated
    answers.py       continuing many prompts at once
    hardware.py      what the machine can do
    stopwatch.py     how fast a model trains
    terminal.py      reading prompts, and showing text while it is generated
    processes.py     the processes that torchrun starts
    model_files.py   models as transformers stores them: downloads, weights, exports
    gpt2_files.py    the settings of GPT-2 and GPT-1 in such files
    llama_files.py   the settings and tokenizers of Llama, Mistral and Qwen3
"""
