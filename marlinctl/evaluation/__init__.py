"""How good is a model, and how far is it from another one? marlinctl/evaluation/run.py is the public face.

windows.py      a text as windows of token ids
divergence.py   two models over the same windows: losses, KL divergence, top-1 agreement
statistics.py   every figure with its standard error
local_data.py   the data of lm_eval's tasks from local copies, without the network
tasks.py        lm_eval's tasks, one leaf at a time
packages.py     what a task needs beyond lm_eval
chat.py         the model's chat template, tried before the tasks
harness.py      the model as lm_eval wants it, with our batch sizes and progress
vllm_backend.py the same, answered by vLLM
models/architectures.py       loading: device, dtype, tokenizer, identity
results.py      the results file: atomic, continued only when nothing differs
table.py        the results as text
"""
