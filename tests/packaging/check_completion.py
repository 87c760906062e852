# SPDX-License-Identifier: MIT
"""Checks what an editor offers after `coupling->`, `sequence->` and `wrapper->`.

    python3 tests/packaging/check_completion.py CLANGD INCLUDE_DIR...

Asks clangd, as an editor does, and exits with 1 if it does not list what users call
of a module of memcnn's, or lists what the library alone calls. Python alone is needed.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

SOURCE = """#include <memcnn/memcnn.h>
#include <torch/nn/modules/linear.h>

int main() {
  torch::nn::Linear branch(2, 2);
  memcnn::AdditiveCoupling coupling(branch, branch);
  memcnn::ReversibleSequence sequence(coupling);
  memcnn::InvertibleModuleWrapper wrapper(coupling);
  ;
}
"""
LINE = SOURCE[: SOURCE.index("  ;")].count("\n")

CALLED = {
    "coupling": {
        *("forward", "inverse", "options", "f", "g", "clone", "given"),
        *("forward_with_log_det", "inverse_with_log_det"),
    },
    "sequence": {
        *("forward_with_log_det", "inverse_with_log_det", "given"),
        *("forward", "inverse", "push_back", "extend", "at", "ptr", "size"),
        *("begin", "end", "is_empty", "kept", "kept_blocks", "options", "clone"),
    },
    "wrapper": {
        "forward",
        "inverse",
        "options",
        "module",
        "kept",
        "input_kept_because",
        "forward_with_log_det",
        "inverse_with_log_det",
        "given",
    },
}
HIDDEN = {
    *("run", "backward_step", "takes_halves_of", "type_name", "rebuild"),
    *("run_with", "log_det", "condition_count", "takes_halves_along", "map"),
    *("undo_update", "take_halves", "block_", "chain_", "exact_", "options_"),
}


class Clangd:
    """A language server, asked one thing after the other."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.asked = 0

    def notify(self, method, **parameters):
        self.send({"method": method, "params": parameters})

    def ask(self, method, **parameters):
        self.asked += 1
        self.send({"id": self.asked, "method": method, "params": parameters})
        while True:
            answer = self.receive()
            if answer.get("id") == self.asked and "method" not in answer:
                return answer["result"]

    def wait_for(self, method):
        while self.receive().get("method") != method:
            pass

    def send(self, message):
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def receive(self):
        length = 0
        while line := self.process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if not length:
            raise EOFError("check_completion.py: clangd has ended.")
        return json.loads(self.process.stdout.read(length))


def completions(clangd, uri, variable, version):
    """What is offered after `variable->`, in the order of an editor."""
    lines = SOURCE.splitlines()
    lines[LINE] = f"  {variable}->"
    document = {"uri": uri, "version": version}
    clangd.notify(
        "textDocument/didChange",
        textDocument=document,
        contentChanges=[{"text": "\n".join(lines)}],
    )
    found = clangd.ask(
        "textDocument/completion",
        textDocument=document,
        position={"line": LINE, "character": len(lines[LINE])},
    )
    items = sorted(found["items"], key=lambda item: item["sortText"])
    return [item["filterText"] for item in items]


def problems_of(variable, offered):
    for name in sorted(CALLED[variable] - set(offered)):
        yield f"{variable}-> does not offer {name}"
    for name in sorted(HIDDEN & set(offered)):
        yield f"{variable}-> offers {name}, which only the library calls"


def main(arguments):
    clangd_path, *folders = arguments
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "-std=c++17",
            *(f"-isystem{pathlib.Path(each).resolve()}" for each in folders),
        ]
        flags_file = pathlib.Path(folder, "compile_flags.txt")
        flags_file.write_text("\n".join(flags), encoding="utf-8")
        uri = pathlib.Path(folder, "main.cpp").as_uri()
        clangd = Clangd([clangd_path, "--limit-results=0", "--background-index=0"])
        clangd.ask("initialize", processId=None, rootUri=None, capabilities={})
        clangd.notify(
            "textDocument/didOpen",
            textDocument={
                "uri": uri,
                "languageId": "cpp",
                "version": 0,
                "text": SOURCE,
            },
        )
        # Before it has read the headers clangd offers the words of the file.
        clangd.wait_for("textDocument/publishDiagnostics")
        for version, variable in enumerate(CALLED, 1):
            offered = completions(clangd, uri, variable, version)
            print(f"{variable}->", *offered)
            problems += problems_of(variable, offered)
        clangd.ask("shutdown")
        clangd.notify("exit")
        clangd.process.wait()
    for problem in problems:
        print(problem)
    print(f"check_completion.py: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
