"""A small OpenAI-compatible server for length-guided generation.

    pip install 'lenvm-rl[serving]'
    python -m lenvm_rl.serve --model outputs/policy --length_value_model outputs/lenvm --port 8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(
        model="outputs/policy", messages=[…], max_tokens=200,
        extra_body={"length_guidance": {"mode": "equal_to", "target_length": 100, "top_k": 64}},
    )

It answers `/v1/completions` and `/v1/chat/completions`, whole or streamed. Requests that wait at the same time are
generated together, each as if it were alone. It is for trying guidance with the tools that speak to such servers. What
a request may say, and what answers add: `lenvm_rl.serve.protocol`. There is no authentication, so it listens on this
machine alone unless told otherwise.
"""
