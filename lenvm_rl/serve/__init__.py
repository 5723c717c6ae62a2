"""A small OpenAI-compatible server for length-guided generation, for a machine without vLLM.

    pip install 'lenvm-rl[serving]'
    python -m lenvm_rl.serve --model outputs/policy --length_value_model outputs/lenvm --port 8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    guidance = {"length_mode": "equal_to", "length_target": 100, "length_top_k": 15}
    client.chat.completions.create(model="outputs/policy", messages=[…], max_tokens=200, extra_body=guidance)

What a request may say: `lenvm_rl.serve.protocol`. There is no authentication: it listens on this machine alone.
"""
