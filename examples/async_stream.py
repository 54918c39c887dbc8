"""Stream an answer from asyncio; the event loop stays free for other tasks.

python examples/async_stream.py [MODEL IMAGE]
"""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from pocketllava import Llava, Message

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


async def count_ticks(stop: asyncio.Event) -> int:
    """Another task of the same event loop."""
    n = 0
    while not stop.is_set():
        await asyncio.sleep(0.001)
        n += 1
    return n


async def main(model: str, image: str) -> None:
    """aclosing() ends the answer within a token if the task is cancelled or the loop is left early."""
    stop = asyncio.Event()
    ticks = asyncio.create_task(count_ticks(stop))
    with await asyncio.to_thread(Llava.load, model) as llava:
        messages = [Message("user", "Describe the image.", image)]
        async with aclosing(llava.astream(messages)) as chunks:
            async for chunk in chunks:
                print(chunk.text, end="", flush=True)
    stop.set()
    print("\nthe event loop stayed free:", await ticks > 1)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]))
