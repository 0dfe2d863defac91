"""How the embedded model is made: facts -> phrasings -> corpus -> tokenizer -> training -> evaluation -> model card."""
