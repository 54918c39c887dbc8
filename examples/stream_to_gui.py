"""Stream an answer to a GUI thread: a worker thread fills a queue, a timer of the GUI empties it.

python examples/stream_to_gui.py [MODEL IMAGE]

`poll` is what a GUI calls from its timer (tkinter's `after`, Qt's QTimer). Here a loop stands for the timer.
"""

import queue
import sys
import threading
import time
from pathlib import Path

from pocketllava import Chunk, Llava, Message

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


class Worker(threading.Thread):
    """Answers in the background; `cancel` ends the answer within a token."""

    def __init__(self, llava: Llava, messages: list[Message]) -> None:
        super().__init__(daemon=True)
        self.chunks: queue.Queue[Chunk | Exception] = queue.Queue()
        self.cancel = threading.Event()
        self._llava, self._messages = llava, messages

    def run(self) -> None:
        try:
            for chunk in self._llava.stream(self._messages, should_stop=self.cancel.is_set):
                self.chunks.put(chunk)
        except Exception as error:  # the GUI has to hear of any, or it would wait for ever
            self.chunks.put(error)


def poll(worker: Worker) -> bool:
    """Show what has arrived; False at the answer's end. Never blocks the GUI."""
    while not worker.chunks.empty():
        chunk = worker.chunks.get()
        if isinstance(chunk, Exception):
            print(f"\n[{chunk}]")
            return False
        print(chunk.text, end="", flush=True)  # a GUI appends it to a text field
        if chunk.finish_reason:
            print(f"\n[{chunk.finish_reason}]")
            return False
    return True


def main(model: str, image: str) -> None:
    with Llava.load(model) as llava:
        worker = Worker(llava, [Message("user", "Describe the image.", image)])
        worker.start()
        while poll(worker):
            time.sleep(0.02)  # 50 times a second, as a GUI's timer would


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])
