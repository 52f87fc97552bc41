"""Triton kernels as compiled for an NVIDIA GPU, executed on a CPU: docs/compiled-code.md says what that shows.

compilation   a kernel and its arguments -> PTX, specialised as a launch would be
ptx           PTX text -> statements
encode        statements -> the arrays that the machine interprets; flow says where lanes that part meet again
machine/      the interpreter, in C++; build compiles it once, machine.py runs it and names what it found
judge         the same verdict on races from a trace and from the definitions, slowly
launched      the package's kernels, run here instead of on a GPU
trials        the lists of trials
counts        instructions, sectors, wavefronts, and the table that they are held to
mutations     barriers, waits and fences taken out, one at a time
"""
