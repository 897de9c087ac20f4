"""Native folders in programs that serve models: transformers, and vLLM (the folder vllm)."""
