"""The local server: OpenAI's and Ollama's routes, and a page in the browser, over one Llava.

Stands on Llava, its types and its errors, and on albums; knows nothing of llama.cpp. Needs the extra `serve`.
"""
