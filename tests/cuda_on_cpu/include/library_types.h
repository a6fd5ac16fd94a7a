/* Element types of the CUDA libraries' interfaces, as far as Keepsake uses them. */
#ifndef KS_SHIM_LIBRARY_TYPES_H
#define KS_SHIM_LIBRARY_TYPES_H

typedef enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 } cudaDataType;
typedef enum cudaDataType_t cudaDataType_t;

#endif
