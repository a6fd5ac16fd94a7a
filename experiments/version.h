/* What was built, from CMake. */
#ifndef KS_VERSION_H
#define KS_VERSION_H

#ifndef KS_VERSION
#define KS_VERSION "0.1.0"
#endif
#if __has_include("ks_commit.h") /* written by experiments/commit.cmake at each build */
#include "ks_commit.h"
#endif
#ifndef KS_COMMIT /* commit of the sources, "-dirty" with changes, "unknown" without git */
#define KS_COMMIT "unknown"
#endif
#ifndef KS_BUILD /* compiler and build type */
#define KS_BUILD "unknown"
#endif

#endif
