"""llama.cpp behind Python. The only room with ctypes, callbacks, private names and children that load models."""
