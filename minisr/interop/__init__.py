"""Models in other formats: Hugging Face folders (read and written) and GGUF files (read).

names.py               names of weights and config keys in other formats, and which configs are supported
end_tokens.py          which token ids end a response, from all places where files declare them
jinja_templates.py     a model's own chat template (Jinja, run in a sandbox) as one of minisr's, and their differences
chat_templates.py      minisr's chat templates, and which of them a model uses
tokenizer_json.py      a Hugging Face tokenizer.json as a vocabulary
sentencepiece_json.py  a SentencePiece model converted to a tokenizer.json
hf.py                  a Hugging Face folder, read and written
gguf.py                a GGUF file, read: weights dequantized, tokenizer included
source.py              any of these or a minisr folder, from one string
"""
