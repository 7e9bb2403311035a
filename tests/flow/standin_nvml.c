/* A stand-in for NVIDIA's libnvidia-ml.so.1 with simulated GPUs, loaded by the real nvidia-ml-py.
 *
 *   NVML_SCENE=nvswitch    eight A100 of 40 GiB, each with twelve NVLinks to a switch
 *   NVML_SCENE=bridges     four V100: some pairs share NVLinks, the others PCIe or the link between sockets
 *   NVML_SCENE=mig         one A100 with two MIG devices; the board reports neither utilisation nor memory
 *   NVML_SCENE=old         two boards with a driver without the newer calls (MIG, NVLink)
 *   NVML_SCENE=none        a driver without GPUs
 *   NVML_LOST=N            GPU N is lost from the start
 *   NVML_DIES=N            after N queries of utilisation every call fails: the GPU is lost
 *
 * Utilisation of GPU n is 10 n + 5 percent, its used memory n + 1 GiB.
 *   g++ -x c -shared -fPIC -o libnvidia-ml.so.1 standin_nvml.c
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, FUNCTION_NOT_FOUND = 13, LOST = 15 };
#define GIB (1ull << 30)
#define MIG_PART 100 /* handles from here on are MIG devices of a board */

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilisation;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} Pci;

static int queries;

static int scene(const char *name) {
    const char *is = getenv("NVML_SCENE");
    return is && !strcmp(is, name);
}

static int setting(const char *name) {
    const char *value = getenv(name);
    return value ? atoi(value) : -1;
}

static int dead(void) { return setting("NVML_DIES") >= 0 && queries >= setting("NVML_DIES"); }

static long number(void *handle) { return (long)handle - 1; }

static void name_bus(long gpu, Pci *pci) { snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02lX:00.0", gpu + 16); }

int nvmlInitWithFlags(unsigned flags) { return flags ? INVALID_ARGUMENT : OK; }
int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int error) {
    switch (error) {
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case LOST: return "GPU is lost";
    default: return "Other";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) { return snprintf(version, size, "550.54.15"), OK; }
int nvmlSystemGetCudaDriverVersion(int *version) { return *version = 12040, OK; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = scene("nvswitch") ? 8 : scene("bridges") ? 4 : scene("old") ? 2 : scene("mig") ? 1 : 0;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if ((int)index == setting("NVML_LOST")) return LOST;
    return *handle = (void *)(long)(index + 1), OK;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    const char *is = scene("bridges") ? "Tesla V100-SXM2-32GB" : scene("old") ? "Tesla K80" : "NVIDIA A100-SXM4-40GB";
    snprintf(name, size, "%s%s", is, number(handle) >= MIG_PART ? " MIG 3g.20gb" : "");
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    if (dead()) return LOST;
    if (scene("mig") && number(handle) < MIG_PART) return NO_PERMISSION;
    memory->total = (number(handle) >= MIG_PART ? 20 : 40) * GIB;
    memory->used = (number(handle) % MIG_PART + 1) * GIB;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilisation *rates) {
    if (dead()) return LOST;
    queries++;
    if (scene("mig")) return NOT_SUPPORTED;
    rates->gpu = 10 * number(handle) + 5;
    rates->memory = 99; /* memory bandwidth, which the profile does not use */
    return OK;
}

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *pci) {
    if (number(handle) >= MIG_PART) return INVALID_ARGUMENT;
    return name_bus(number(handle), pci), OK;
}

/* GPUs 0 and 1, and 2 and 3, share a PCIe switch; the pairs are on two sockets. */
int nvmlDeviceGetTopologyCommonAncestor(void *one, void *other, int *level) {
    return *level = number(one) / 2 == number(other) / 2 ? 10 : 50, OK;
}

/* bridges: two links between 0 and 1, one between 0 and 2, and link 5 of each board is down. */
static int bridge(long gpu, unsigned link) {
    static const int ends[4][3] = {{1, 1, 2}, {0, 0, -1}, {0, -1, -1}, {-1, -1, -1}};
    return link < 3 ? ends[gpu][link] : -1;
}

int nvmlDeviceGetNvLinkState(void *handle, unsigned link, unsigned *active) {
    if (scene("old") || scene("mig")) return NOT_SUPPORTED;
    if (link >= (scene("nvswitch") ? 12 : 6)) return INVALID_ARGUMENT;
    return *active = scene("nvswitch") || bridge(number(handle), link) >= 0, OK;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned link, unsigned *type) {
    (void)handle, (void)link;
    return scene("nvswitch") ? (*type = 2, OK) : FUNCTION_NOT_FOUND; /* as drivers before 470 */
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned link, Pci *pci) {
    if (scene("nvswitch")) return snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:C%u:00.0", link % 6), OK;
    return name_bus(bridge(number(handle), link), pci), OK;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    (void)handle;
    return *count = scene("mig") ? 7 : 0, OK; /* NVML: zero if MIG is not supported or enabled */
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    (void)handle;
    return index < 2 ? (*part = (void *)(long)(MIG_PART + 1 + index), OK) : NOT_FOUND;
}
