"""What all papers share: data, zero-shot evaluation, process setup and the embedded emoji corpus."""
