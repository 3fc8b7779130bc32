"""All that is upstream's: the only room that names private parts of torch, transformers or PEFT."""
