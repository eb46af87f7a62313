"""Serves traces with vLLM, for the benchmark beside it. Runs in vLLM's own environment and imports nothing of ours.

    python vllm_worker.py MODEL [JSON with arguments for vllm.LLM]

A line of JSON in, `[{"token_ids": [...], "max_tokens": 8, "arrival": 0.0}, ...]`, a line of JSON out:
`{"seconds": ..., "results": [{"token_ids": [...], "ttft": ..., "finished": ...}, ...]}`, times in seconds since arrival.
"""

import json
import os
import sys
import time

os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the engine in this process: nobody polls while others run
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def serve(engine, trace: list[dict]) -> dict:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    pending = sorted(enumerate(trace), key=lambda item: item[1]["arrival"])
    results: list[dict] = [{} for _ in trace]
    start = time.perf_counter()
    while pending or engine.has_unfinished_requests():
        while pending and time.perf_counter() - start >= pending[0][1]["arrival"]:
            i, request = pending.pop(0)
            params = SamplingParams(
                temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
            )
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=request["token_ids"]), params)
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, pending[0][1]["arrival"] - (time.perf_counter() - start)))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            i = int(output.request_id.split("-")[0])
            results[i].setdefault("ttft", now - trace[i]["arrival"])
            if output.finished:
                results[i] |= {"finished": now - trace[i]["arrival"], "token_ids": list(output.outputs[0].token_ids)}
    return {"seconds": time.perf_counter() - start, "results": results}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the error stream
    import vllm

    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    llm = vllm.LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=2048, max_num_seqs=64, **options)
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        llm.reset_prefix_cache()  # every run starts cold, as the others do
        print(json.dumps(serve(llm.llm_engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
