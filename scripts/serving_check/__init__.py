"""This package compares what servers answer with what transformers answers; scripts/test_serving.sh runs it.

The modules run in three environments, because vLLM demands another transformers than llama.cpp's converter or this package:
`make` and `table` in this package's, `ask_vllm` and `ask_llama` in the servers'. They exchange JSON files.
"""
