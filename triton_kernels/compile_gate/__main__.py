from ddk_pipe.triton_kernels.compile_gate.program import main

main()
