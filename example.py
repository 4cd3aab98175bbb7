"""The smallest program: two prompts through the embedded model, on any machine. `python example.py [MODEL]`"""

import sys
import time

from nanovllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None)
    questions = ["Introduce yourself in one sentence.", "List three prime numbers and say why they are prime."]
    prompts = [llm.apply_chat_template([{"role": "user", "content": question}]) for question in questions]

    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=80))
    seconds = time.perf_counter() - start

    for question, output in zip(questions, outputs):
        print(f"\nPrompt: {question}\nAnswer: {output['text']}")
    num_tokens = sum(len(output.token_ids) for output in outputs)
    print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
