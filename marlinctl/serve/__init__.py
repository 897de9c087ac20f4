"""Native folders in programs that serve models: transformers, vLLM and SGLang; native/ is what the servers share."""
