"""Real models in, real models out: Hugging Face folders, GGUF files.

names.py   what others call our weights and our config; which chat template theirs is
sentencepiece_json.py  a SentencePiece model as a tokenizer.json
hf.py      a Hugging Face folder, read and written
gguf.py    a GGUF file, read: weights dequantized, tokenizer included
source.py  any of these, or a minisr folder, by its name
"""
