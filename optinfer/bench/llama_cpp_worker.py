"""Serves traces with llama.cpp, for the benchmarks beside it. Runs in an environment of its own and imports nothing of ours.

    python llama_cpp_worker.py SOURCE.gguf FORMAT THREADS      needs the packages xllamacpp, gguf and numpy

SOURCE's weights are written anew in FORMAT (such as BF16, Q8_0, Q4_0; "" runs the file as it is). A line of JSON in,
`[{"token_ids": [...], "max_tokens": 8, "arrival": 0.0}, ...]`, a line of JSON out: `{"results": [{"num_tokens": ...,
"ttft": ..., "finished": ..., "per_token": ...}, ...]}`, times in seconds since arrival; `per_token` is llama.cpp's own
figure for the tokens after the first.
"""

import json
import os
import sys
import tempfile
import threading
import time

SLOTS = 64


def convert(source: str, target: str, name: str) -> None:
    """The same model with its matrices in another format; vectors stay float32."""
    import gguf

    reader, kind = gguf.GGUFReader(source), gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: str, threads: int):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.kv_unified = 16384, SLOTS, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    return xllamacpp.Server(params)


def serve(server, trace: list[dict]) -> dict:
    start = time.perf_counter()
    results: list[dict] = [{} for _ in trace]
    # Following every token costs time of its own: only where requests arrive one by one, and waiting is what counts.
    follow = any(request["arrival"] for request in trace)

    def ask(i: int, request: dict) -> None:
        time.sleep(max(0.0, request["arrival"] - (time.perf_counter() - start)))
        chunks: list[dict] = []

        def on_chunk(chunk) -> None:
            chunk = chunk if isinstance(chunk, dict) else json.loads(chunk)
            results[i].setdefault("ttft", time.perf_counter() - start - request["arrival"])
            chunks.append(chunk)

        question = {
            "prompt": request["token_ids"],
            "n_predict": request["max_tokens"],
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["temperature"],  # greedy, with nothing to sort before it
            "cache_prompt": False,  # every run starts cold, as the others do
            "stream": follow,
            "stream_options": {"include_usage": True},
        }
        answer = server.handle_completions(question, on_chunk) if follow else server.handle_completions(question)
        done = next(c for c in reversed(chunks) if "timings" in c) if follow else answer
        results[i] |= {
            "finished": time.perf_counter() - start - request["arrival"],
            "num_tokens": done["timings"]["predicted_n"],
            "per_token": done["timings"]["predicted_ms"] / 1e3 / max(1, done["timings"]["predicted_n"] - 1),
        }

    threads = [threading.Thread(target=ask, args=item) for item in enumerate(trace)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"results": results}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints goes to the error stream
    import xllamacpp

    source, name, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:  # a file that is mapped may be deleted
        path = source
        if name:
            path = os.path.join(folder, "model.gguf")
            convert(source, path, name)
        server = load(path, threads)
    print(json.dumps({"version": xllamacpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(server, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
