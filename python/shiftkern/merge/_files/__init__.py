"""Merging of files: reading and writing safetensors, statistics in streaming passes, and journals to go on from."""
